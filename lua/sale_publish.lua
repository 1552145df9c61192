#!lua
-- sale_publish: make a sale known to Redis, once: its facts, stock, lines and streams.
--
-- KEYS[1] sale    hash    the sale
-- KEYS[2] stock   hash    sku -> units left
-- KEYS[3] buyers  hash    must not exist
-- KEYS[4] orders  stream  created with its consumer group
-- KEYS[5] asks    stream  created with its consumer group
-- KEYS[6...] items        item hash of every sku, in the order of ARGV
-- ARGV[1] epoch      integer >= 1
-- ARGV[2] home       run_id the caller's connection saw
-- ARGV[3] now_ms     integer, 0 = server TIME
-- ARGV[4] sale_id    part of the first link of each chain
-- ARGV[5] seed_hash  hex SHA-256 of the seed
-- ARGV[6] group      name of the consumer groups
-- ARGV[7] n          number of items
-- ARGV[8...] pairs   n pairs sku, units; then pairs of a field of `sale` and its value
--
-- Returns {'PUBLISHED'} | {'ALREADY'} same epoch | {'OTHER', epoch} | {'LEFTOVER'}: keys of this sale without `sale`
-- Law: a sale is published once an epoch; nothing that exists is written over. The token bucket starts full.
-- Cost: O(items).
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch then
  return epoch == ARGV[1] and {'ALREADY'} or {'OTHER', epoch}
end
if redis.call('EXISTS', unpack(KEYS)) > 0 then
  return {'LEFTOVER'}
end
local now = tonumber(ARGV[3])
if now == 0 then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local n = tonumber(ARGV[7])
local burst = 0
for i = 8 + 2 * n, #ARGV, 2 do
  if ARGV[i] == 'burst' then
    burst = tonumber(ARGV[i + 1])
  end
end
redis.call('XGROUP', 'CREATE', KEYS[4], ARGV[6], '0', 'MKSTREAM')
redis.call('XGROUP', 'CREATE', KEYS[5], ARGV[6], '0', 'MKSTREAM')
for i = 1, n do
  local sku, units = ARGV[6 + 2 * i], ARGV[7 + 2 * i]
  local chain = redis.sha1hex('fairdrop:1:' .. ARGV[4] .. ':' .. sku .. ':' .. ARGV[1] .. ':' .. ARGV[5])
  redis.call('HSET', KEYS[2], sku, units)
  redis.call('HSET', KEYS[5 + i], 'next_seq', 1, 'served', 0, 'early', 0, 'chain', chain, 'drawn', 0, 'drawn_n', 0,
    'drawn_key', '', 'beacon_used', '', 'dead_seq', 0, 'paused', 0)
end
redis.call('HSET', KEYS[1], unpack(ARGV, 8 + 2 * n))
redis.call('HSET', KEYS[1], 'fmt', 1, 'epoch', ARGV[1], 'home', ARGV[2], 'seed_hash', ARGV[5], 'last_ms', now,
  'tokens_micro', burst * 1000000, 'opened', 0)
return {'PUBLISHED'}
