-- part sale: the fence and the clock. The script ends here with GONE or OLD if the caller's view is not this Redis' view.
--
-- Uses KEYS[1] sale, ARGV[1] epoch, ARGV[2] home (the run_id the caller's connection saw), ARGV[3] now_ms (0 = TIME).
-- Gives S (fields as strings, but the two counts of claims), now, closed, open, paused.
-- Law: no sale key means closed, never zero; another epoch or home changes nothing; time never runs back.
local S
do
  local v = redis.call('HMGET', KEYS[1], 'epoch', 'home', 'last_ms', 'paused', 'closed', 'line_opens_ms', 'opens_ms',
    'closes_ms', 'freeze_ms', 'opened', 'rate_milli', 'burst', 'tokens_micro', 'limit', 'line_max', 'standby', 'slow_milli',
    'advice_until_ms', 'claims_open', 'claims_made')
  S = {epoch = v[1], home = v[2], last_ms = v[3], paused = v[4], closed = v[5], line_opens_ms = v[6], opens_ms = v[7],
    closes_ms = v[8], freeze_ms = v[9], opened = v[10], rate_milli = v[11], burst = v[12], tokens_micro = v[13],
    limit = v[14], line_max = v[15], standby = v[16] == '1', slow_milli = v[17], advice_until_ms = v[18],
    claims_open = tonumber(v[19] or 0), claims_made = tonumber(v[20] or 0)}
end
if not S.epoch then
  return {'GONE'}
end
if S.epoch ~= ARGV[1] or S.home ~= ARGV[2] then
  return {'OLD'}
end
local now = tonumber(ARGV[3])
if now == 0 then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
now = math.max(now, tonumber(S.last_ms))
local closed = S.closed == '1' or now >= tonumber(S.closes_ms)
local open = S.opened == '1' or now >= tonumber(S.opens_ms)
local paused = S.paused == '1'
