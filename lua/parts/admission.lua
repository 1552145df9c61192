-- part admission: what those who give out places and units ask of the sale beyond the fence: bucket, backlog, limits.
--
-- Uses KEYS[1] sale. Needs part sale. Adds to S (strings, but the two counts of claims): freeze_ms, rate_milli, burst,
-- tokens_micro, line_max, slow_milli, advice_until_ms, claims_open, claims_made.
-- A read of its own, so that whoever needs none of it (a buyer who is told sold out) does not pay for it.
do
  local v = redis.call('HMGET', KEYS[1], 'freeze_ms', 'rate_milli', 'burst', 'tokens_micro', 'line_max', 'slow_milli',
    'advice_until_ms', 'claims_open', 'claims_made')
  S.freeze_ms, S.rate_milli, S.burst, S.tokens_micro, S.line_max = v[1], v[2], v[3], v[4], v[5]
  S.slow_milli, S.advice_until_ms = v[6], v[7]
  S.claims_open, S.claims_made = tonumber(v[8] or 0), tonumber(v[9] or 0)
end
