-- part make: a sale comes into being: streams with their groups, items, and last its own hash.
--
-- Uses KEYS[1] sale, KEYS[2] stock, KEYS[4] orders, KEYS[5] asks, KEYS[6...] items; ARGV as sale_publish names 1 to 7.
-- Gives make_item(i, sku, units, first, starts, paused) and make_sale(from): the pairs of `sale` begin at ARGV[from].
-- Law: the chain begins anew with each epoch; the token bucket starts full.
local function make_streams()
  redis.call('XGROUP', 'CREATE', KEYS[4], ARGV[6], '0', 'MKSTREAM')
  redis.call('XGROUP', 'CREATE', KEYS[5], ARGV[6], '0', 'MKSTREAM')
end
local function make_item(i, sku, units, first, starts, paused)
  local chain = redis.sha1hex('fairdrop:1:' .. ARGV[4] .. ':' .. sku .. ':' .. ARGV[1] .. ':' .. ARGV[5])
  redis.call('HSET', KEYS[2], sku, units)
  redis.call('HSET', KEYS[5 + i], 'next_seq', first, 'served', string.format('%d', first - 1), 'early', 0, 'chain', chain,
    'drawn', 0, 'drawn_n', 0, 'drawn_key', '', 'beacon_used', '', 'dead_seq', 0, 'paused', paused, 'starts', starts)
end
local function make_sale(from)
  local now = tonumber(ARGV[3])
  if now == 0 then
    local t = redis.call('TIME')
    now = t[1] * 1000 + math.floor(t[2] / 1000)
  end
  local burst = 0
  for i = from, #ARGV, 2 do
    if ARGV[i] == 'burst' then
      burst = tonumber(ARGV[i + 1])
    end
  end
  redis.call('HSET', KEYS[1], unpack(ARGV, from))
  redis.call('HSET', KEYS[1], 'fmt', 1, 'epoch', ARGV[1], 'home', ARGV[2], 'seed_hash', ARGV[5], 'last_ms', now,
    'tokens_micro', burst * 1000000, 'opened', 0, 'claims_open', 0, 'claims_made', 0)
end
