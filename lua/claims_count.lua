#!lua
-- claims_count: set the number of open claims right, if nothing has moved since the stream was counted.
--
-- KEYS[1] sale  hash  the sale
-- ARGV[1] epoch    integer >= 1
-- ARGV[2] home     run_id the caller's connection saw
-- ARGV[3] now_ms   integer, 0 = server TIME
-- ARGV[4] made     `claims_made` when it was counted
-- ARGV[5] open_    `claims_open` then
-- ARGV[6] counted  claims that the entries of `orders` held
--
-- Returns {'GONE'} | {'OLD'} | {'COUNTED', claims_open}
-- Law: the number moves with the entries in every script that adds or removes one; here it only follows them.
-- Cost: O(1).
--@ part sale
--@ part admission
local made, open_, counted = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if S.claims_made ~= made or S.claims_open ~= open_ then
  return {'COUNTED', S.claims_open}
end
redis.call('HSET', KEYS[1], 'claims_open', ARGV[6])
return {'COUNTED', counted}
