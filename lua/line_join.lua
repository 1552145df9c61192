#!lua
-- line_join: give a batch of buyers of one item their places: a unit at once, a place in the line, or the ticket they have.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] stock    hash    sku -> units left
-- KEYS[4] outcome  string  one byte a ticket
-- KEYS[5] line     stream  waiting tickets, ids <seq>-0
-- KEYS[6] orders   stream  claims on their way to Postgres
-- KEYS[7] buyers   hash    buyer_id -> sku:seq:units, the newest ticket
-- KEYS[8] drawn    string  10 bytes for each ticket that is in the draw
-- KEYS[9...] others        item and outcome of every other sku of the sale, in the order of ARGV[10 + n ...]
-- ARGV[1] epoch        integer >= 1
-- ARGV[2] home         run_id the caller's connection saw
-- ARGV[3] now_ms       integer, 0 = server TIME
-- ARGV[4] sku          of this item
-- ARGV[5] backlog_max  claims waiting for Postgres before new ones are refused
-- ARGV[6] n            number of buyers
-- ARGV[7] again        n characters, 1: an ended ticket does not keep this buyer from a new one
-- ARGV[8] hashes       n x 10 bytes: ticket hashes
-- ARGV[9] units_each   integer >= 1, what everyone wants; or n of them, with commas between
-- ARGV[10...] buyers   n buyer ids, then the other skus
--
-- Returns {'GONE'} | {'OLD'} | {'JOINED', now_ms, served, next_seq, words, old...}
--   words: a letter for each buyer, in their order. The new tickets have the last seqs before next_seq, in that order.
--     W waits in the line (new) · C a unit is taken (new)
--     H has a ticket: live with the same body, or ended and not again · X has a live ticket for something else
--     K closed · Y not open yet · L above the limit · S sold out · F line full · B busy: nothing is stored
--   old: for each H and X, in their order, 'sku:seq:units' and its byte
-- Law: one live ticket a buyer; seqs are given once, without gaps; a unit leaves `stock` only together with its claim in
--   `orders`; at once only while nobody waits. A call whose answers are all refusals or old tickets writes nothing.
-- Cost: 7 reads and at most 6 writes a batch: all its claims are one entry; and one XADD for each new ticket that waits.
--   4 reads and no table for a batch of which nobody has a ticket and nobody can get one.
--@ part sale
local ITEM, STOCK = KEYS[2], KEYS[3]
local sku = ARGV[4]
--@ part item
local n = tonumber(ARGV[6])
local BUYERS = 9  -- ARGV[BUYERS + i] is buyer i
local held = redis.call('HMGET', KEYS[7], unpack(ARGV, BUYERS + 1, BUYERS + n))
local limit = tonumber(S.limit)
local line_open = open or now >= tonumber(S.line_opens_ms)
local same_units = tonumber(ARGV[9])  -- of everyone; nil: each wants their own

-- What everyone is told who has no ticket, because nothing in this batch can change it.
local turned = closed and 'K' or not line_open and 'Y' or nil
if not turned and same_units and (same_units > limit or open and not S.standby and stock == 0) then
  turned = same_units > limit and 'L' or 'S'
end
local holders = 0
for i = 1, n do
  if held[i] then
    holders = holders + 1
  end
end
if turned and holders == 0 then
  return {'JOINED', now, I.served, I.next_seq, string.rep(turned, n)}
end

-- the tickets that buyers of this batch already have: one read for all of this item
local byte_of = {}  -- the effective byte of the ticket that buyer i has
if holders > 0 then
  local gets, who, seqs = {}, {}, {}
  local mine, other = 0, nil
  for i = 1, n do
    if held[i] then
      local of, digits = string.match(held[i], '^([^:]*):(%d+)')
      local seq = tonumber(digits)
      byte_of[i] = 'o'
      if of == sku then
        mine = mine + 1
        who[mine], seqs[mine] = i, seq
        local at = mine * 3
        gets[at - 2], gets[at - 1], gets[at] = 'GET', 'u8', string.format('#%d', seq - 1)
      else
        if not other then
          other = {}
          for k = BUYERS + n + 1, #ARGV do
            other[ARGV[k]] = 9 + (k - BUYERS - n - 1) * 2
          end
        end
        local at = other[of]
        if at then
          local byte = redis.call('GETRANGE', KEYS[at + 1], seq - 1, seq - 1)
          if byte ~= '' and byte ~= '\0' then
            byte_of[i] = byte
          end
          if byte == 'w' and seq <= tonumber(redis.call('HGET', KEYS[at], 'dead_seq') or 0) then
            byte_of[i] = 's'
          end
        end
      end
    end
  end
  if mine > 0 then
    local bytes = redis.call('BITFIELD_RO', KEYS[4], unpack(gets))
    for k = 1, mine do
      if bytes[k] == 119 and seqs[k] <= I.dead_seq then
        byte_of[who[k]] = 's'
      elseif bytes[k] > 0 then
        byte_of[who[k]] = string.char(bytes[k])
      end
    end
  end
end
--@ part admission
--@ part tokens
local LIVE = {w = true, c = true, r = true, p = true}

local backlog_max = tonumber(ARGV[5])
local backlog = S.claims_open
local waiting, line_max = nil, tonumber(S.line_max)  -- of the line, read for the first who must wait
local first = I.next_seq
local seq, served, left = first, I.served, stock  -- as they will be after this batch
local serving = open and I.ready and not paused and not I.paused
local ends = open and not S.standby  -- who finds nothing left is told so at once
local early = not open and now < tonumber(S.freeze_ms) and I.early == first - 1
local again, hashes, chain = ARGV[7], ARGV[8], {}

-- A number that becomes text costs more than all else here (printf of a double): the last digit of a seq comes from a
-- table, the digits before it are made into text once for ten tickets; all that claims have in common is their entry's.
local DIGIT = {[0] = '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'}
local prefix = sku .. ':'
local tens = first < 10 and '' or string.format('%d', math.floor(first / 10))
local text, units = ARGV[9], same_units
local each = not units and string.gmatch(text, '%d+')

local fresh = {}  -- buyer -> where in tickets their ticket of this batch is
local tickets, t = {}, 0  -- arguments of HSET
local claims, c = {}, 0  -- pairs of their entry: seq:units, buyer
local places, w = {}, 0  -- arguments of each XADD
local words = {}
local reply, r = {'JOINED', now, 0, 0, ''}, 5

for i = 1, n do
  local buyer = ARGV[BUYERS + i]
  if each then
    text = each()
    units = tonumber(text)
  end
  local ticket, byte = held[i], nil
  local mine = fresh[buyer]
  if mine then
    ticket, byte = tickets[mine], first + mine / 2 - 1 <= served and 'c' or 'w'
  elseif ticket then
    byte = byte_of[i]
    if byte == 'w' and closed then
      byte = 'x'
    end
    if not LIVE[byte] and string.byte(again, i) == 49 then
      ticket = nil
    end
  end
  local word
  if ticket then
    local of, count = string.match(ticket, '^([^:]*):%d+:(%d+)$')
    word = (of == sku and tonumber(count) == units or not LIVE[byte]) and 'H' or 'X'
    reply[r + 1], reply[r + 2] = ticket, byte
    r = r + 2
  elseif turned then
    word = turned
  elseif units > limit then
    word = 'L'
  elseif ends and (left == 0 or units > left and served == seq - 1) then
    word = 'S'
  else
    local claim = serving and served == seq - 1 and units <= left and (unlimited or tokens >= TOKEN)
    if not claim then
      waiting = waiting or redis.call('XLEN', KEYS[5])
    end
    if not claim and waiting >= line_max then
      word = 'F'
    elseif open and backlog >= backlog_max then
      word = 'B'
    else
      local digit = DIGIT[seq % 10]
      t = t + 2
      fresh[buyer] = t
      if claim then
        local place = tens .. digit .. ':' .. text
        tickets[t - 1], tickets[t] = buyer, prefix .. place
        left, tokens, backlog, served = left - units, tokens - TOKEN, backlog + 1, seq
        c = c + 2
        claims[c - 1], claims[c] = place, buyer
        word = 'C'
      else
        local id = tens .. digit  -- as good as <seq>-0
        tickets[t - 1], tickets[t] = buyer, prefix .. id .. ':' .. text
        waiting = waiting + 1
        w = w + 2
        places[w - 1], places[w] = id, text .. ':' .. buyer
        word = 'W'
      end
      if early then
        local hash = string.sub(hashes, i * 10 - 9, i * 10)
        I.chain = redis.sha1hex(I.chain .. hash .. tens .. digit)
        chain[#chain + 1] = hash
      end
      seq = seq + 1
      if digit == '9' then
        tens = string.format('%d', seq / 10)
      end
    end
  end
  words[i] = word
end
reply[3], reply[4], reply[5] = served, seq, table.concat(words)
if seq == first then
  return reply
end

redis.call('HSET', KEYS[7], unpack(tickets))
redis.call('SETRANGE', KEYS[4], first - 1, string.rep('c', c / 2) .. string.rep('w', w / 2))
for i = 1, w, 2 do
  redis.call('XADD', KEYS[5], places[i], 'b', places[i + 1])
end
if early then
  redis.call('SETRANGE', KEYS[8], (first - 1) * 10, table.concat(chain))
  redis.call('HSET', ITEM, 'next_seq', seq, 'served', served, 'early', seq - 1, 'chain', I.chain)
else
  redis.call('HSET', ITEM, 'next_seq', seq, 'served', served)
end
if c > 0 then
  redis.call('HSET', STOCK, sku, left)
  redis.call('XADD', KEYS[6], '*', 'c', '1|' .. S.epoch .. '|' .. sku .. '|' .. string.format('%d', now), unpack(claims))
end
if open then
  redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', unlimited and 0 or tokens, 'opened', '1',
    'claims_open', backlog, 'claims_made', S.claims_made + c / 2)
else
  redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', tokens)
end
return reply
