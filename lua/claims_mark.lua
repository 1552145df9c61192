#!lua
-- claims_mark: tell a batch of claimed tickets of one item that their orders are written, and take their entries off the
-- stream; leave any other ticket and its entry alone.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] outcome  string  one byte a ticket
-- KEYS[3] status   hash    sku:seq -> version|byte|json
-- KEYS[4] orders   stream  claims on their way to Postgres
-- ARGV[1] epoch      integer >= 1
-- ARGV[2] home       run_id the caller's connection saw
-- ARGV[3] now_ms     integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] group      consumer group of orders
-- ARGV[6] like       name of the form
-- ARGV[7] form       what the buyer is told (json), a zero byte where the order number goes
-- ARGV[8] numbers    the order numbers, n x 24 characters; n is 1..1000 tickets
-- ARGV[9] r          runs of tickets that follow each other
-- ARGV[10...] runs   first seq, length, r times; then of their entries: ms, first nth, length, for each run of `ms-nth`
--
-- Returns {'GONE'} | {'OLD'} | {'MARKED', done}: for each ticket 1 its entry is done, 0 not the plain case: ask ticket_mark
-- Law: claimed -> reserved with version 1, where nothing was told before; whatever was told has a version at least as new.
--   An entry leaves only with its ticket told, in one step. The ask under way stays shown. Units never move here.
--   The stream is trimmed only up to where nothing is pending: all of that was delivered, and done.
-- Cost: O(n), a handful of calls for n tickets that follow each other. XTRIM frees whole nodes; XDEL costs an entry 1.5 us.
--@ part sale
local OUTCOME, STATUS, ORDERS = KEYS[2], KEYS[3], KEYS[4]
local numbers, r = ARGV[8], tonumber(ARGV[9])
local before, behind = '1|r|{"like":"' .. ARGV[6] .. '","order_no":"', '"}'
local prefix = ARGV[4] .. ':'
local fields, entries = {}, {}
local n, m = 0, 0
for at = 10, 8 + 2 * r, 2 do
  local first = tonumber(ARGV[at])
  for seq = first, first + tonumber(ARGV[at + 1]) - 1 do
    n = n + 1
    fields[n] = prefix .. seq
  end
end
for at = 10 + 2 * r, #ARGV, 3 do
  local ms, first = ARGV[at] .. '-', tonumber(ARGV[at + 1])
  for nth = first, first + tonumber(ARGV[at + 2]) - 1 do
    m = m + 1
    entries[m] = ms .. nth
  end
end
local told = redis.call('HMGET', STATUS, unpack(fields))
local done, ids, tell, changes = {}, {}, {}, {}
local d, t, i = 0, 0, 0
for at = 10, 8 + 2 * r, 2 do
  local first, length = tonumber(ARGV[at]) - 1, tonumber(ARGV[at + 1])
  local bytes = redis.call('GETRANGE', OUTCOME, first, first + length - 1)
  local left = {}  -- claimed, and told already: these bytes stay
  for k = 1, length do
    i = i + 1
    local claimed = string.byte(bytes, k) == 99
    if claimed and not told[i] then
      tell[t + 1], tell[t + 2] = fields[i], before .. string.sub(numbers, i * 24 - 23, i * 24) .. behind
      t = t + 2
    elseif claimed then
      left[#left + 1] = k
    end
    if claimed or told[i] then
      d = d + 1
      done[i], ids[d] = '1', entries[i]
    else
      done[i] = '0'
    end
  end
  local after = string.gsub(bytes, 'c', 'r')
  for _, k in ipairs(left) do
    after = string.sub(after, 1, k - 1) .. 'c' .. string.sub(after, k + 1)
  end
  if after ~= bytes then
    changes[#changes + 1] = {first, after}
  end
end
for _, change in ipairs(changes) do
  redis.call('SETRANGE', OUTCOME, change[1], change[2])
end
if t > 0 then
  redis.call('HSETNX', STATUS, '=' .. ARGV[6], ARGV[7])
  redis.call('HSET', STATUS, unpack(tell))
end
if d > 0 then
  redis.call('XACK', ORDERS, ARGV[5], unpack(ids))
  local function of(id)
    local ms, nth = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(nth)
  end
  local ms, nth = of(ids[d])
  local beyond = string.format('%.0f-%.0f', ms, nth + 1)
  local oldest_ms, oldest_nth = of(redis.call('XPENDING', ORDERS, ARGV[5])[2] or beyond)
  if oldest_ms > ms or oldest_ms == ms and oldest_nth > nth then
    redis.call('XTRIM', ORDERS, 'MINID', '=', beyond)
  else
    redis.call('XDEL', ORDERS, unpack(ids))
  end
end
return {'MARKED', table.concat(done)}
