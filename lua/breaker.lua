#!lua
-- breaker: one turn of a supplier's breaker: learn results, obey a switch, give permits; record each transition.
--
-- KEYS[1]  breaker      hash    state, window, probes, last error: app/breaker.py's Breaker, spelled out
-- KEYS[2]  history      stream  field `e` = JSON of a transition, the newest `history_max`
-- ARGV[1]  now_ms       integer, 0 = server TIME
-- ARGV[2]  rules        the numbers of app/breaker.py's Rules, joined by commas
-- ARGV[3]  rand         number in [0, 1): jitter of an open interval that begins in this turn
-- ARGV[4]  who          process or operator, told in the history
-- ARGV[5]  history_max  integer >= 1
-- ARGV[6]  mode_first   auto | forced_open | disabled | metrics_only: of a breaker that is not here yet; '' = only look
-- ARGV[7]  switch_to    auto | forced_open | disabled | metrics_only; '' = no switch
-- ARGV[8]  wanted       integer >= 0: permits
-- ARGV[9]  n            integer >= 0: results, in the rest
-- ARGV[10...] results   for each: generation, serial (0: no probe's), took_ms, s(uccess) | f(ailure) | i(gnored), error
--
-- Returns {'STANDS', now_ms, state, mode, generation, since_ms, until_ms, openings, calls, failures, slow, granted,
--          serial, settled, last_error, events} | {'GONE'}
--   now_ms, since_ms, until_ms: the breaker's clock, which never runs back. granted: permits given; the probes among
--   them have the serials up to `serial`. settled: for each result c(ounted) | i(gnored) | l(ate). events: JSON list.
-- Law: in half-open, probes out and probes decided are never more than probes_max together; a result counts once, in
--      its own generation and within its lease, or not at all; every transition is in the history, once.
-- Cost: O(window + n), the window being at most window_calls characters or window_ms / bucket_ms numbers.
local wall = tonumber(ARGV[1])
if wall == 0 then
  local t = redis.call('TIME')
  wall = t[1] * 1000 + math.floor(t[2] / 1000)
end
local R = {}
for number in string.gmatch(ARGV[2], '[^,]+') do
  R[#R + 1] = tonumber(number)
end
local failure_rate, slow_rate, slow_ms, by_count, window_calls, window_ms, bucket_ms = unpack(R, 1, 7)
local calls_min, open_ms, open_growth, open_max_ms, jitter, probes_max, half_open_max_ms, lease_ms = unpack(R, 8, 15)
local rand, who, history_max = tonumber(ARGV[3]), ARGV[4], ARGV[5]
local mode_first, switch_to, wanted, n = ARGV[6], ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])

-- Read.
local old, flat = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  old[flat[i]] = flat[i + 1]
end
if #flat == 0 and mode_first == '' then
  return {'GONE'}
end
local last = tonumber(old.last_ms or wall)
local skew = math.max(tonumber(old.skew_ms or 0), last - wall) -- a clock that was set back: ours goes on from where it was
local now = wall + skew
local mode = old.mode or mode_first
local state = old.state or (mode == 'auto' and 'closed' or mode)
-- Generations begin at the time: those of a breaker that was lost with its Redis never come again.
local generation = tonumber(old.generation or wall)
local since, till = tonumber(old.since_ms or now), tonumber(old.until_ms or 0)
local openings, serial = tonumber(old.openings or 0), tonumber(old.serial or 0)
local window, told, last_error = old.window or '', old.told or '', old.last_error or ''
local probes = {} -- in the order of their leases: {serial, lease end}
for number, ends in string.gmatch(old.probes or '', '(%d+):(%d+)') do
  probes[#probes + 1] = {tonumber(number), tonumber(ends)}
end

-- Decide. The window: 'c' and a digit a call (1 failed, 2 slow, 3 both), or 't' and number:calls:failures:slow a bucket.
local events = {}
local function by_calls()
  return state == 'half_open' or by_count == 1
end
local function counts()
  local calls, failures, slow = 0, 0, 0
  if by_calls() then
    if string.sub(window, 1, 1) == 'c' then
      calls = #window - 1
      local _, failed = string.gsub(window, '[13]', '')
      local _, slowed = string.gsub(window, '[23]', '')
      failures, slow = failed, slowed
    end
  elseif string.sub(window, 1, 1) == 't' then
    local first = math.floor(now / bucket_ms) - window_ms / bucket_ms
    for number, c, f, s in string.gmatch(window, '(%d+):(%d+):(%d+):(%d+)') do
      if tonumber(number) > first then
        calls, failures, slow = calls + c, failures + f, slow + s
      end
    end
  end
  return calls, failures, slow
end
local function add(failed, slow)
  if by_calls() then
    local size = state == 'half_open' and probes_max or window_calls
    local digits = string.sub(window, 1, 1) == 'c' and string.sub(window, 2) or ''
    window = 'c' .. string.sub(digits .. string.format('%d', failed + 2 * slow), -size)
    return
  end
  local current = math.floor(now / bucket_ms)
  local first, kept, found = current - window_ms / bucket_ms, {}, false
  if string.sub(window, 1, 1) == 't' then
    for number, c, f, s in string.gmatch(window, '(%d+):(%d+):(%d+):(%d+)') do
      if tonumber(number) == current then
        found = true
        c, f, s = c + 1, f + failed, s + slow
      end
      if tonumber(number) > first then
        kept[#kept + 1] = string.format('%s:%d:%d:%d', number, c, f, s)
      end
    end
  end
  if not found then
    kept[#kept + 1] = string.format('%d:1:%d:%d', current, failed, slow)
  end
  window = 't' .. table.concat(kept, ' ')
end
local function tell(before, after, at, why, open_for_ms, calls, failures, slow)
  events[#events + 1] = cjson.encode({
    at_ms = wall - (now - at), before = before, after = after, why = why, calls = calls, failures = failures,
    slow = slow, last_error = last_error ~= '' and last_error or cjson.null, open_for_ms = open_for_ms, by = who,
  })
end
local function move(after, at, why)
  local before, open_for = state, 0
  local calls, failures, slow = counts()
  state, since, window, told, probes = after, at, '', '', {}
  generation = math.max(generation + 1, wall)
  if after == 'open' then
    openings = openings + 1
    local grown = math.min(open_max_ms, open_ms * open_growth ^ math.min(openings - 1, 64))
    open_for = math.max(1, math.floor(grown * (1 + jitter * (2 * rand - 1)) + 0.5))
    till = at + open_for
  elseif after == 'half_open' then
    till = at + half_open_max_ms
  elseif after == 'closed' then
    openings = 0
  end
  tell(before, after, at, why, open_for, calls, failures, slow)
end
local function reached(calls, failures, slow, least)
  local failing = calls >= least and failures * 100 >= failure_rate * calls
  local crawling = calls >= least and slow * 100 >= slow_rate * calls
  return failing, crawling, failing and 'failure_rate' or crawling and 'slow_rate' or nil
end
local least = by_count == 1 and math.min(calls_min, window_calls) or calls_min

if state == 'half_open' and half_open_max_ms > 0 and now >= till then
  move('open', till, 'half_open_too_long') -- counted from when the wait was over, not from when somebody looked
end

local settled = {}
for i = 1, n do
  local at = 9 + (i - 1) * 5
  local era, number, took, result, failure = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]),
    ARGV[at + 4], ARGV[at + 5]
  local word = (era ~= generation or took >= lease_ms) and 'l' or 'c'
  if word == 'c' and state == 'half_open' then
    word = 'l'
    for k, probe in ipairs(probes) do
      if probe[1] == number then
        word = probe[2] > now and 'c' or 'l'
        table.remove(probes, k)
        break
      end
    end
  end
  if word == 'c' then
    if result == 'f' and failure ~= '' then
      last_error = failure
    end
    if result == 'i' then
      word = 'i'
    elseif state ~= 'disabled' then
      add(result == 'f' and 1 or 0, took > slow_ms and 1 or 0)
      local calls, failures, slow = counts()
      if state == 'closed' then
        local _, _, why = reached(calls, failures, slow, least)
        if why then
          move('open', now, why)
        end
      elseif state == 'metrics_only' then
        local failing, crawling = reached(calls, failures, slow, least)
        if failing and not string.find(told, 'f', 1, true) then
          told = told .. 'f'
          tell(state, state, now, 'failure_rate', 0, calls, failures, slow)
        end
        if crawling and not string.find(told, 's', 1, true) then
          told = told .. 's'
          tell(state, state, now, 'slow_rate', 0, calls, failures, slow)
        end
      elseif calls >= probes_max then
        local _, _, why = reached(calls, failures, slow, probes_max)
        move(why and 'open' or 'closed', now, why or 'recovered')
      end
    end
  end
  settled[i] = word
end

if switch_to ~= '' and switch_to ~= mode then
  mode, openings = switch_to, 0
  move(mode == 'auto' and 'closed' or mode, now, 'operator')
end

local granted = 0
if wanted > 0 then
  if state == 'open' and now >= till then
    move('half_open', now, 'interval_over')
  end
  if state == 'half_open' then
    while probes[1] and probes[1][2] <= now do
      table.remove(probes, 1) -- its process died, or its task was cancelled
    end
    local decided = counts()
    granted = math.max(0, math.min(wanted, probes_max - #probes - decided))
    for _ = 1, granted do
      serial = serial + 1
      probes[#probes + 1] = {serial, now + lease_ms}
    end
  elseif state ~= 'open' and state ~= 'forced_open' then
    granted = wanted
  end
end

-- Write what has changed.
local out = {}
for k, probe in ipairs(probes) do
  out[k] = string.format('%d:%d', probe[1], probe[2])
end
local new = {
  state = state, mode = mode, window = window, told = told, last_error = last_error, probes = table.concat(out, ' '),
  generation = string.format('%d', generation), since_ms = string.format('%d', since),
  until_ms = string.format('%d', till), openings = string.format('%d', openings), serial = string.format('%d', serial),
  skew_ms = string.format('%d', skew),
}
local changed = {}
for name, value in pairs(new) do
  if old[name] ~= value then
    changed[#changed + 1] = name
    changed[#changed + 1] = value
  end
end
if #changed > 0 then
  changed[#changed + 1] = 'last_ms'
  changed[#changed + 1] = string.format('%d', now)
  redis.call('HSET', KEYS[1], unpack(changed))
end
for _, event in ipairs(events) do
  redis.call('XADD', KEYS[2], 'MAXLEN', history_max, '*', 'e', event)
end
local calls, failures, slow = counts()
return {'STANDS',
  now, state, mode, generation, since, till, openings, calls, failures, slow, granted, serial,
  table.concat(settled), last_error, '[' .. table.concat(events, ',') .. ']',
}
