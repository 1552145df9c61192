-- part sale: the fence and the clock. The script ends here with GONE or OLD if the caller's view is not this Redis' view.
--
-- Uses KEYS[1] sale, ARGV[1] epoch, ARGV[2] home (the run_id the caller's connection saw), ARGV[3] now_ms (0 = TIME).
-- Gives S (fields as strings; more of them: part admission), now, closed, open, paused.
-- Law: no sale key means closed, never zero; another epoch or home changes nothing; time never runs back.
local S
do
  local v = redis.call('HMGET', KEYS[1], 'epoch', 'home', 'last_ms', 'paused', 'closed', 'line_opens_ms', 'opens_ms',
    'closes_ms', 'opened', 'limit', 'standby')
  S = {epoch = v[1], home = v[2], last_ms = v[3], paused = v[4], closed = v[5], line_opens_ms = v[6], opens_ms = v[7],
    closes_ms = v[8], opened = v[9], limit = v[10], standby = v[11] == '1'}
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
