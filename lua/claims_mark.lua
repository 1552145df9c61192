#!lua
-- claims_mark: tell a batch of claimed tickets of one item that their orders are written; leave any other ticket alone.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] outcome  string  one byte a ticket
-- KEYS[3] status   hash    sku:seq -> version|byte|json
-- ARGV[1] epoch      integer >= 1
-- ARGV[2] home       run_id the caller's connection saw
-- ARGV[3] now_ms     integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] n          tickets, 1..1000
-- ARGV[6...] tickets n seqs, rising; then n times what the buyer is told (json)
--
-- Returns {'GONE'} | {'OLD'} | {'MARKED', done}: for each ticket 1 marked, 0 not the plain case: ask ticket_mark
-- Law: claimed -> reserved with version 1, where nothing was told before; all else is for ticket_mark. The ask under way
--   stays shown. Units never move here.
-- Cost: O(n), a handful of calls for n tickets that follow each other.
--@ part sale
local OUTCOME, STATUS = KEYS[2], KEYS[3]
local sku, n = ARGV[4], tonumber(ARGV[5])
local seqs, fields = {}, {}
for i = 1, n do
  seqs[i] = tonumber(ARGV[5 + i])
  fields[i] = sku .. ':' .. ARGV[5 + i]
end
local told = redis.call('HMGET', STATUS, unpack(fields))
local done, tell, runs = {}, {}, {}
local i = 1
while i <= n do
  local first, last = i, i
  while last < n and seqs[last + 1] == seqs[last] + 1 do
    last = last + 1
  end
  local bytes = redis.call('GETRANGE', OUTCOME, seqs[first] - 1, seqs[last] - 1)
  local changed = false
  local after = {}
  for at = first, last do
    local byte = string.sub(bytes, at - first + 1, at - first + 1)
    if byte == 'c' and not told[at] then
      done[at], byte, changed = '1', 'r', true
      tell[#tell + 1] = fields[at]
      tell[#tell + 1] = '1|r|' .. ARGV[5 + n + at]
    else
      done[at] = '0'
    end
    after[#after + 1] = byte
  end
  if changed then
    runs[#runs + 1] = {seqs[first] - 1, table.concat(after)}
  end
  i = last + 1
end
for _, run in ipairs(runs) do
  redis.call('SETRANGE', OUTCOME, run[1], run[2])
end
if #tell > 0 then
  redis.call('HSET', STATUS, unpack(tell))
end
return {'MARKED', table.concat(done)}
