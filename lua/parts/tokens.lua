-- part tokens: the token bucket, settled to `now`. One token a ticket; leaderless, because the state is in `sale`.
--
-- Needs part sale. Gives unlimited, tokens (millionths of a ticket), TOKEN (one ticket).
-- Law: 0 <= tokens <= burst; nothing flows in while paused. rate_milli x ms is millionths exactly, so no fraction is lost
-- however often it is settled; the elapsed time is clamped before the product, which stays below 2^53.
local TOKEN = 1000000
local rate_milli = tonumber(S.rate_milli)
local unlimited = rate_milli < 0
local tokens = tonumber(S.tokens_micro)
if paused or unlimited then
  tokens = 0
else
  local full = tonumber(S.burst) * TOKEN
  if rate_milli > 0 and tokens < full then
    local elapsed = now - S.last_ms
    if elapsed >= math.ceil((full - tokens) / rate_milli) then
      tokens = full
    else
      tokens = tokens + elapsed * rate_milli
    end
  end
  tokens = math.min(tokens, full)
end
