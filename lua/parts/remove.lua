-- part remove: take entries off `orders` whose claims have all had their outcome, and count those claims no longer.
--
-- Uses KEYS[1] sale. Needs ORDERS (key). Gives remove(group, over, open), how many were there: over is id, claims in it,
--   id, claims in it, …; open is `claims_open`, false: the sale is gone.
-- Law: an entry is acknowledged and deleted in one step, and `claims_open` moves with it by what it held; an entry that is
--   gone already counts nothing. Without entries there are no claims. A sale that is gone stays gone.
-- Cost: one XACK, and one XDEL for all entries that hold equally many claims.
local function remove(group, over, open)
  if #over == 0 then
    return 0
  end
  local ids, alike = {}, {}
  for at = 1, #over, 2 do
    local id, count = over[at], over[at + 1]
    ids[#ids + 1] = id
    alike[count] = alike[count] or {}
    table.insert(alike[count], id)
  end
  local gone, claims = 0, 0
  redis.call('XACK', ORDERS, group, unpack(ids))
  for count, same in pairs(alike) do
    local deleted = redis.call('XDEL', ORDERS, unpack(same))
    gone, claims = gone + deleted, claims + deleted * count
  end
  if open and gone > 0 then
    local left = math.max(0, open - claims)
    if left > 0 and redis.call('XLEN', ORDERS) == 0 then
      left = 0
    end
    redis.call('HSET', KEYS[1], 'claims_open', left)
  end
  return gone
end
