-- part opening: the first step after the opening fixes N, the key of the draw and `drawn`, all at once.
--
-- Uses KEYS[1] sale. Needs ITEM (key), parts sale, item; call only when open.
-- Gives draw_now() -> nil (already drawn) | false (wait for the beacon) | {n, key, beacon_used}, and draw_write(that).
-- Law: key = SHA-1(seed bytes .. chain head .. beacon); beacon is '' for source none and 'missing' when it did not come within
-- beacon_wait_ms after the opening; with nobody in the draw nothing is waited for.
local function draw_now()
  if I.drawn then
    return nil
  end
  local v = redis.call('HMGET', KEYS[1], 'seed', 'beacon_source', 'beacon_value', 'beacon_wait_ms')
  local beacon = v[3] or ''
  if v[2] == 'none' or not v[2] or I.early == 0 then
    beacon = ''
  elseif beacon == '' then
    if now < S.opens_ms + (tonumber(v[4]) or 0) then
      return false
    end
    beacon = 'missing'
  end
  local seed = string.gsub(v[1], '%x%x', function(hex) return string.char(tonumber(hex, 16)) end)
  return {n = I.early, key = redis.sha1hex(seed .. I.chain .. beacon), beacon_used = beacon}
end
local function draw_write(d)
  redis.call('HSET', ITEM, 'drawn', '1', 'drawn_n', d.n, 'drawn_key', d.key, 'beacon_used', d.beacon_used)
  I.drawn, I.drawn_n, I.drawn_key = true, d.n, d.key
end
