#!lua
-- claims_mark: tell a batch of claimed tickets of one item that their orders are written, and take those entries off the
-- stream that are told whole; leave any other ticket and its entry alone.
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
-- ARGV[10...] runs   first seq, length, r times; then entries: id, how many of the tickets, in their order, are all it holds
--
-- Returns {'GONE'} | {'OLD'} | {'MARKED', done}: for each ticket 1 told, 0 not the plain case: ask ticket_mark
-- Law: claimed -> reserved with version 1, where nothing was told before; whatever was told has a version at least as new.
--   An entry leaves only with all its tickets told, in one step. The ask under way stays shown. Units never move here.
-- Cost: O(n), a handful of calls for n tickets that follow each other, and XACK and XDEL of their entries.
--@ part sale
local OUTCOME, STATUS, ORDERS = KEYS[2], KEYS[3], KEYS[4]
--@ part remove
local numbers, r = ARGV[8], tonumber(ARGV[9])
local before, behind = '1|r|{"like":"' .. ARGV[6] .. '","order_no":"', '"}'
local prefix = ARGV[4] .. ':'
local DIGIT = {[0] = '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'}
local fields, n = {}, 0
for at = 10, 8 + 2 * r, 2 do
  local first = tonumber(ARGV[at])
  local tens
  for seq = first, first + tonumber(ARGV[at + 1]) - 1 do  -- a number becomes text once for ten tickets: see line_join
    local digit = seq % 10
    if digit == 0 or not tens then
      tens = seq < 10 and prefix or prefix .. string.format('%d', (seq - digit) / 10)
    end
    n = n + 1
    fields[n] = tens .. DIGIT[digit]
  end
end
local told = redis.call('HMGET', STATUS, unpack(fields))
local claims_open = tonumber(redis.call('HGET', KEYS[1], 'claims_open') or 0)
local done, tell, changes = {}, {}, {}
local t, i = 0, 0
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
    done[i] = (claimed or told[i]) and '1' or '0'
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
local words, over, first = table.concat(done), {}, 1
for at = 10 + 2 * r, #ARGV, 2 do
  local count = tonumber(ARGV[at + 1])
  if not string.find(string.sub(words, first, first + count - 1), '0', 1, true) then
    over[#over + 1], over[#over + 2] = ARGV[at], count
  end
  first = first + count
end
remove(ARGV[5], over, claims_open)
return {'MARKED', words}
