#!lua flags=allow-oom
-- claims_remove: take entries off the stream whose claims have all had their outcome, and count those claims no longer.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] orders   stream  claims on their way to Postgres
-- ARGV[1] group         consumer group of orders
-- ARGV[2...] entries    id, claims in it, for each entry; at most 1000
--
-- Returns {'REMOVED', count} entries that were there
-- Law: see part remove. Not fenced: what Postgres has decided is over in every epoch, and nothing else moves.
-- Cost: O(entries). Runs when memory is full: it gives back.
local ORDERS = KEYS[2]
--@ part remove
local over = {}
for at = 2, #ARGV, 2 do
  over[at - 1], over[at] = ARGV[at], tonumber(ARGV[at + 1])
end
return {'REMOVED', remove(ARGV[1], over, tonumber(redis.call('HGET', KEYS[1], 'claims_open') or nil))}
