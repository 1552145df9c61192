#!lua
-- sale_switch: change a published sale (pause, resume, rate, close, message, times, document), in the order of versions.
--
-- KEYS[1] sale     hash    the sale
-- ARGV[1] epoch    integer >= 1
-- ARGV[2] home     run_id the caller's connection saw
-- ARGV[3] now_ms   integer, 0 = server TIME
-- ARGV[4] version  of Postgres' sale; must be above the one applied
-- ARGV[5...] pairs of a field of `sale` and its value
--
-- Returns {'GONE'} | {'OLD'} | {'SWITCHED'} | {'STALE', version} | {'CLOSED_FOR_GOOD'}
-- Law: versions only grow. The bucket is settled at the old rate first, cut to the new burst, and empty after a pause.
--   Close is one field, O(1), final. A sale past its closing time is closed by whatever switch comes next.
-- Cost: O(fields).
--@ part sale
--@ part admission
--@ part tokens
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version >= tonumber(ARGV[4]) then
  return {'STALE', version}
end
local to = {paused = S.paused, closed = closed and '1' or '0', burst = S.burst, rate_milli = S.rate_milli}
for i = 5, #ARGV, 2 do
  if ARGV[i] == 'closed' and closed and ARGV[i + 1] ~= '1' then
    return {'CLOSED_FOR_GOOD'}
  end
  to[ARGV[i]] = ARGV[i + 1]
end
if to.paused == '1' or tonumber(to.rate_milli) < 0 then
  tokens = 0
end
tokens = math.min(tokens, tonumber(to.burst) * TOKEN)
redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', tokens, 'version', ARGV[4], 'closed', to.closed,
  unpack(ARGV, 5))
return {'SWITCHED'}
