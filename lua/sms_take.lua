#!lua
-- sms_take: let a phone number get one more text, or count nothing: all three limits allow it, or none is touched.
--
-- KEYS[1] minute  string  theoretical arrival time (GCRA) under the limit for a minute, ms
-- KEYS[2] hour    string  the same for an hour
-- KEYS[3] day     string  the same for a day
-- ARGV[1] now_ms         integer, 0 = server TIME
-- ARGV[2] minute_period  integer >= 1, ms: one more is allowed each period; and so on for hour and day
-- ARGV[3] minute_burst   integer >= 1: so many at once after a pause
-- ARGV[4] hour_period
-- ARGV[5] hour_burst
-- ARGV[6] day_period
-- ARGV[7] day_burst
--
-- Returns {'TAKEN', left} | {'WAIT', ms}
-- Law: never more than burst + elapsed / period under any of the three; a refusal writes nothing.
-- Cost: O(1).
local now = tonumber(ARGV[1])
if now == 0 then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local after, wait, left = {}, 0, nil
for at = 1, 3 do
  local period, burst = tonumber(ARGV[2 * at]), tonumber(ARGV[2 * at + 1])
  local arrival = math.max(tonumber(redis.call('GET', KEYS[at]) or now), now)
  after[at] = arrival + period
  local early = after[at] - burst * period - now
  wait = math.max(wait, early)
  left = math.min(left or burst, math.floor(-early / period))
end
if wait > 0 then
  return {'WAIT', wait}
end
for at = 1, 3 do
  redis.call('SET', KEYS[at], string.format('%d', after[at]), 'PX', string.format('%d', after[at] - now))
end
return {'TAKEN', left}
