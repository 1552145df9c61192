-- part serve: give units to the next ranks of the line. First plan (reads only), then apply (writes only).
--
-- Uses KEYS[1] sale. Needs ITEM, STOCK, OUTCOME, LINE, ORDERS (keys), `sku`, parts sale, tokens, item, draw. Gives serve_plan(units, n, key, work_max, backlog_max) -> P, serve_apply(P).
-- P: served, stock, tokens, claimed (count), busy, changed, and what to write.
-- Law: ranks in order, each once; one token a ticket; a unit leaves `stock` only together with its claim in `orders`.
--   A ticket that left is passed without a token; one that cannot be filled whole is sold out and the next is tried.
--   Without standby, stock 0 makes everyone unserved sold out (dead_seq). With standby served stops there.
-- Cost: O(work_max): a read and a permutation for each drawn rank, one read for all later ones; all claims are one entry.
local function serve_plan(units_left, drawn_n, drawn_key, work_max, backlog_max)
  local P = {served = I.served, stock = units_left, tokens = tokens, claimed = 0, busy = false, dead = false,
    claims = {}, sets = {}, gone = {}, trim = false}
  local last = I.next_seq - 1
  local room = backlog_max - S.claims_open
  local work, stop, D = 0, false, nil
  local sets, gone = P.sets, P.gone  -- arguments of BITFIELD, ids that leave the line

  -- A number that becomes text costs more than all else here (printf of a double): each is made into text once.
  local limited = not unlimited
  local function reach(seq, digits, b)  -- decide about the ticket at the next rank: true = served or closed, false = stop before it
    local count = string.match(b, '^%d+')
    local units = count == '1' and 1 or tonumber(count)
    local byte
    if units > P.stock then
      if P.stock == 0 or S.standby then
        return false
      end
      byte = '115'
    elseif room <= 0 then
      P.busy = true
      return false
    elseif limited and P.tokens < TOKEN then
      return false
    else
      P.stock, P.tokens, room, P.claimed = P.stock - units, P.tokens - TOKEN, room - 1, P.claimed + 1
      byte = '99'
      P.claims[2 * P.claimed - 1], P.claims[2 * P.claimed] = digits .. ':' .. count, string.sub(b, #count + 2)
    end
    local at = #sets
    sets[at + 1], sets[at + 2], sets[at + 3], sets[at + 4] = 'SET', 'u8', string.format('#%d', seq - 1), byte
    return true
  end

  while not stop and P.served < last and work < work_max and P.stock > 0 do
    if P.served < drawn_n then
      D = D or draw_keys(drawn_key, drawn_n)
      local seq = seq_of(D, P.served + 1)
      local digits = string.format('%d', seq)
      local id = digits .. '-0'
      local entry = redis.call('XRANGE', LINE, id, id, 'COUNT', '1')[1]
      work = work + 1
      if not entry then
        P.served = P.served + 1
      elseif reach(seq, digits, entry[2][2]) then
        gone[#gone + 1] = id
        P.served = P.served + 1
      else
        stop = true
      end
    else
      local able = math.min(P.stock, math.max(room, 1))
      if not unlimited then
        able = math.min(able, math.max(math.floor(P.tokens / TOKEN), 1))
      end
      local count = math.min(work_max - work, able)
      local found = redis.call('XRANGE', LINE, string.format('%d-0', P.served + 1), '+', 'COUNT', count)
      for i = 1, #found do
        local digits = string.sub(found[i][1], 1, -3)
        local seq = tonumber(digits)
        if reach(seq, digits, found[i][2][2]) then
          gone[#gone + 1] = found[i][1]
          P.served = seq
        else
          P.served = seq - 1  -- those who left before it are passed
          stop = true
          break
        end
      end
      if not stop and #found < count then
        P.served = last
      end
      work = work + math.max(#found, 1)
    end
  end
  if P.stock == 0 and not S.standby and P.served < last then
    P.dead, P.served = true, last
  end
  if unlimited then
    P.tokens = 0
  end
  P.trim = P.served >= drawn_n  -- then every entry up to served is gone: one call instead of one walk for each
  P.changed = P.served ~= I.served or P.dead
  return P
end

local function serve_apply(P)
  if not P.changed then
    return
  end
  for first = 1, #P.sets, 4000 do  -- unpack has a limit of 8,000 values
    redis.call('BITFIELD', OUTCOME, unpack(P.sets, first, math.min(first + 3999, #P.sets)))
  end
  if P.dead then
    redis.call('UNLINK', LINE)
    redis.call('HSET', ITEM, 'served', P.served, 'dead_seq', P.served)
  else
    if #P.gone > 0 and P.trim then
      redis.call('XTRIM', LINE, 'MINID', '=', string.format('%d-0', P.served + 1))
    elseif #P.gone > 0 then
      redis.call('XDEL', LINE, unpack(P.gone))
    end
    redis.call('HSET', ITEM, 'served', P.served)
  end
  if P.claimed > 0 then
    redis.call('HSET', STOCK, sku, P.stock)
    redis.call('XADD', ORDERS, '*', 'c', '1|' .. S.epoch .. '|' .. sku .. '|' .. string.format('%d', now), unpack(P.claims))
  end
  redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', P.tokens, 'opened', '1',
    'claims_open', S.claims_open + P.claimed, 'claims_made', S.claims_made + P.claimed)
end
