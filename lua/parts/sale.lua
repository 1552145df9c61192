-- part sale: the fence and the clock. The script ends here with GONE or OLD if the caller's view is not this Redis' view.
--
-- Uses KEYS[1] sale, ARGV[1] epoch, ARGV[2] home (the run_id the caller's connection saw), ARGV[3] now_ms (0 = TIME).
-- Gives S (fields as strings), now, closed, open, paused.
-- Law: no sale key means closed, never zero; another epoch or home changes nothing; time never runs back.
local S = {}
do
  local v = redis.call('HMGET', KEYS[1], 'epoch', 'home', 'last_ms', 'paused', 'closed', 'line_opens_ms', 'opens_ms',
    'closes_ms', 'freeze_ms', 'opened', 'rate_milli', 'burst', 'tokens_micro', 'limit', 'line_max', 'standby', 'slow_milli',
    'advice_until_ms')
  S.epoch, S.home, S.last_ms, S.paused, S.closed, S.line_opens_ms, S.opens_ms = v[1], v[2], v[3], v[4], v[5], v[6], v[7]
  S.closes_ms, S.freeze_ms, S.opened, S.rate_milli, S.burst, S.tokens_micro = v[8], v[9], v[10], v[11], v[12], v[13]
  S.limit, S.line_max, S.standby, S.slow_milli, S.advice_until_ms = v[14], v[15], v[16] == '1', v[17], v[18]
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
