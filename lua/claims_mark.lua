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
-- ARGV[6] before     what the buyer is told (json) up to the order number
-- ARGV[7] behind     and behind it
-- ARGV[8] newest     which of these tickets has the newest entry, 1..n
-- ARGV[9] numbers    the order numbers, n x 24 characters
-- ARGV[10] r         runs of tickets that follow each other
-- ARGV[11] n         tickets, 1..1000
-- ARGV[12...] tickets r lengths of runs; n seqs, rising; n ids of their entries
--
-- Returns {'GONE'} | {'OLD'} | {'MARKED', done}: for each ticket 1 its entry is done, 0 not the plain case: ask ticket_mark
-- Law: claimed -> reserved with version 1, where nothing was told before; whatever was told has a version at least as new.
--   An entry leaves only with its ticket told, in one step. The ask under way stays shown. Units never move here.
--   The stream is trimmed only up to where nothing is pending: all of that was delivered, and done.
-- Cost: O(n), a handful of calls for n tickets that follow each other. XTRIM frees whole nodes; XDEL costs an entry 1.5 us.
--@ part sale
local OUTCOME, STATUS, ORDERS = KEYS[2], KEYS[3], KEYS[4]
local sku, r, n = ARGV[4], tonumber(ARGV[10]), tonumber(ARGV[11])
local before, behind, numbers = '1|r|' .. ARGV[6], ARGV[7], ARGV[9]
local RUNS, SEQS, IDS = 11, 11 + r, 11 + r + n  -- ARGV[IDS + i] is the entry of ticket i
local prefix = sku .. ':'
local fields = {}
for i = 1, n do
  fields[i] = prefix .. ARGV[SEQS + i]
end
local told = redis.call('HMGET', STATUS, unpack(fields))
local done, ids, tell, changes = {}, {}, {}, {}
local d, t, i = 0, 0, 0
for run = 1, r do
  local first, length = tonumber(ARGV[SEQS + i + 1]) - 1, tonumber(ARGV[RUNS + run])
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
      done[i], ids[d] = '1', ARGV[IDS + i]
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
  redis.call('HSET', STATUS, unpack(tell))
end
if d > 0 then
  redis.call('XACK', ORDERS, ARGV[5], unpack(ids))
  local function of(id)
    local ms, nth = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(nth)
  end
  local ms, nth = of(ARGV[IDS + tonumber(ARGV[8])])
  local beyond = string.format('%.0f-%.0f', ms, nth + 1)
  local oldest_ms, oldest_nth = of(redis.call('XPENDING', ORDERS, ARGV[5])[2] or beyond)
  if oldest_ms > ms or oldest_ms == ms and oldest_nth > nth then
    redis.call('XTRIM', ORDERS, 'MINID', '=', beyond)
  else
    redis.call('XDEL', ORDERS, unpack(ids))
  end
end
return {'MARKED', table.concat(done)}
