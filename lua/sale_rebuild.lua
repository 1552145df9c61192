#!lua
-- sale_rebuild: open a sale again in a new epoch, once what its tickets are told has been written beside it.
--
-- KEYS[1] sale      hash    must not exist
-- KEYS[2] stock     hash    sku -> units left
-- KEYS[3] buyers    hash    written before this call: who has an order
-- KEYS[4] orders    stream  created with its consumer group
-- KEYS[5] asks      stream  created with its consumer group
-- KEYS[6...] items          item hash of every sku, in the order of ARGV
-- ARGV[1] epoch      integer >= 2
-- ARGV[2] home       run_id the caller's connection saw
-- ARGV[3] now_ms     integer, 0 = server TIME
-- ARGV[4] sale_id    part of the first link of each chain
-- ARGV[5] seed_hash  hex SHA-256 of the seed
-- ARGV[6] group      name of the consumer groups
-- ARGV[7] n          number of items
-- ARGV[8...] pairs   n times sku, units, first seq of the epoch, starts, paused 0|1; then pairs of a field of `sale`
--
-- Returns {'REBUILT'} | {'ALREADY'} same epoch | {'OTHER', epoch}
-- Law: the sale's own hash is written last, so until then every script answers GONE; streams, stock and items of an
--   earlier epoch are gone before. Seqs go on behind the last one that has an order; nobody waits; the bucket is full.
-- Cost: O(items), and what it takes to free the old streams, in the background.
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch then
  return epoch == ARGV[1] and {'ALREADY'} or {'OTHER', epoch}
end
--@ part make
local n = tonumber(ARGV[7])
redis.call('UNLINK', KEYS[2], unpack(KEYS, 4))
make_streams()
for i = 1, n do
  local at = 3 + 5 * i
  make_item(i, ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3], ARGV[at + 4])
end
make_sale(8 + 5 * n)
return {'REBUILT'}
