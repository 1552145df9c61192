-- part tokens: the token bucket, settled to `now`. One token a ticket; leaderless, because the state is in `sale`.
--
-- Needs parts sale, admission. Gives unlimited, tokens (millionths of a ticket), TOKEN (one ticket).
-- Law: 0 <= tokens <= burst; nothing flows in while paused. rate_milli x ms is millionths exactly, so no fraction is lost
-- however often it is settled; the elapsed time is clamped before the product, which stays below 2^53.
-- While advice holds (sale_advise; slow_milli >= 0 and now < advice_until_ms) the rate is the lower of the operator's and
-- slow_milli, and the bucket holds a second of it. It ends by the clock, on the millisecond, whoever died meanwhile.
local TOKEN = 1000000
local unlimited, tokens = false, 0
do
  local function filled(have, ms, rate, burst)
    local full = burst * TOKEN
    if rate > 0 and have < full then
      if ms >= math.ceil((full - have) / rate) then
        have = full
      else
        have = have + ms * rate
      end
    end
    return math.min(have, full)
  end
  local rate, burst = tonumber(S.rate_milli), tonumber(S.burst)
  local slow, from, ends = tonumber(S.slow_milli or -1), tonumber(S.last_ms), tonumber(S.advice_until_ms or 0)
  local slowed = slow >= 0 and now < ends
  unlimited, tokens = rate < 0 and not slowed, paused and 0 or tonumber(S.tokens_micro)
  if slow >= 0 and from < ends and not paused then
    local slow_rate, slow_burst = slow, math.max(1, math.ceil(slow / 1000))
    if rate >= 0 then
      slow_rate, slow_burst = math.min(slow, rate), math.min(slow_burst, burst)
    end
    tokens = filled(tokens, math.min(now, ends) - from, slow_rate, slow_burst)
    from = math.min(now, ends)
  end
  if unlimited then
    tokens = 0
  elseif not slowed and not paused then
    tokens = filled(tokens, now - from, rate, burst)
  end
end
