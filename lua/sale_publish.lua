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
--@ part make
local n = tonumber(ARGV[7])
make_streams()
for i = 1, n do
  make_item(i, ARGV[6 + 2 * i], ARGV[7 + 2 * i], 1, '', 0)
end
make_sale(8 + 2 * n)
return {'PUBLISHED'}
