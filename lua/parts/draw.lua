-- part draw: rank = P(seq) on 1..n, a generalised Feistel permutation. The same integers as app/draw.py, which explains it.
--
-- Gives draw_keys(key_hex, n) -> D, rank_of(D, seq), seq_of(D, rank).
-- Law: a bijection on 1..n; every product is below 2^51, so doubles are exact.
-- Cost: 8 rounds a step, on average at most (a x b) / n steps, which tends to 1.
local DRAW_ROUNDS = 8
local DRAW_PRIME = 33554393
local function draw_keys(key_hex, n)
  local a = math.ceil(math.sqrt(n))
  while a * a < n do
    a = a + 1
  end
  local D = {n = n, a = a, b = math.ceil(n / a)}
  for round = 1, DRAW_ROUNDS do
    local h = redis.sha1hex(key_hex .. ':' .. round)
    for part = 0, 2 do
      D[#D + 1] = tonumber(string.sub(h, part * 12 + 1, part * 12 + 12), 16) % DRAW_PRIME
    end
  end
  return D
end
local function rank_of(D, seq)
  local a, b, n, p = D.a, D.b, D.n, DRAW_PRIME
  local x = seq - 1
  repeat
    local l, r = x % a, math.floor(x / a)
    for k = 1, DRAW_ROUNDS * 3, 6 do
      local t = (r + D[k]) % p
      t = (t * t + D[k + 1]) % p
      l = (l + (t * t + D[k + 2]) % p) % a
      t = (l + D[k + 3]) % p
      t = (t * t + D[k + 4]) % p
      r = (r + (t * t + D[k + 5]) % p) % b
    end
    x = r * a + l
  until x < n
  return x + 1
end
local function seq_of(D, rank)
  local a, b, n, p = D.a, D.b, D.n, DRAW_PRIME
  local x = rank - 1
  repeat
    local l, r = x % a, math.floor(x / a)
    for k = DRAW_ROUNDS * 3 - 5, 1, -6 do
      local t = (l + D[k + 3]) % p
      t = (t * t + D[k + 4]) % p
      r = (r - (t * t + D[k + 5]) % p) % b
      t = (r + D[k]) % p
      t = (t * t + D[k + 1]) % p
      l = (l - (t * t + D[k + 2]) % p) % a
    end
    x = r * a + l
  until x < n
  return x + 1
end
