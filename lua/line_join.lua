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
-- KEYS[9...] others        item and outcome of every other sku of the sale, in the order of ARGV[9 + 2n ...]
-- ARGV[1] epoch        integer >= 1
-- ARGV[2] home         run_id the caller's connection saw
-- ARGV[3] now_ms       integer, 0 = server TIME
-- ARGV[4] sku          of this item
-- ARGV[5] backlog_max  claims waiting for Postgres before new ones are refused
-- ARGV[6] n            number of buyers
-- ARGV[7] again        n characters, 1: an ended ticket does not keep this buyer from a new one
-- ARGV[8] hashes       n x 10 bytes: ticket hashes
-- ARGV[9...] buyers    n buyer ids, then n numbers of units (integer >= 1), then the other skus
--
-- Returns {'GONE'} | {'OLD'} | {'JOINED', now_ms, served, next_seq, answer...}, for each buyer, in their order, one of
--   'W', seq                     waits in the line (new)
--   'C', seq                     a unit is taken (new)
--   'H', sku, seq, units, byte   has this ticket: live with the same body, or ended and not again
--   'X', sku, seq, units, byte   has this live ticket for something else
--   'K' closed · 'Y' not open yet · 'L' above the limit · 'S' sold out · 'F' line full · 'B' busy: nothing is stored
-- Law: one live ticket a buyer; seqs are given once, without gaps; a unit leaves `stock` only together with its entry in
--   `orders`; at once only while nobody waits. A call whose answers are all refusals or old tickets writes nothing.
-- Cost: 7 reads and at most 6 writes a batch, and one XADD for each new ticket.
--@ part sale
--@ part tokens
local ITEM, STOCK = KEYS[2], KEYS[3]
local sku = ARGV[4]
--@ part item
local n = tonumber(ARGV[6])
local again, hashes = ARGV[7], ARGV[8]
local UNITS = 8 + n  -- ARGV[UNITS + i] is the units of buyer i
local held = redis.call('HMGET', KEYS[7], unpack(ARGV, 9, 8 + n))

-- the tickets that the buyers of this batch already have: one read for all of this item
local have = {}
do
  local gets, who = {}, {}
  local other
  for i = 1, n do
    if held[i] then
      local cut = string.find(held[i], ':', 1, true)
      local next_cut = string.find(held[i], ':', cut + 1, true)
      local of, seq = string.sub(held[i], 1, cut - 1), tonumber(string.sub(held[i], cut + 1, next_cut - 1))
      local ticket = {sku = of, seq = seq, units = tonumber(string.sub(held[i], next_cut + 1)), byte = 'o'}
      have[i] = ticket
      if of == sku then
        local at = #gets
        gets[at + 1], gets[at + 2], gets[at + 3] = 'GET', 'u8', '#' .. string.format('%d', ticket.seq - 1)
        who[#who + 1] = ticket
      else
        if not other then
          other = {}
          for k = UNITS + n + 1, #ARGV do
            other[ARGV[k]] = 9 + (k - UNITS - n - 1) * 2
          end
        end
        local at = other[of]
        if at then
          local byte = redis.call('GETRANGE', KEYS[at + 1], ticket.seq - 1, ticket.seq - 1)
          if byte ~= '' and byte ~= '\0' then
            ticket.byte = byte
          end
          if byte == 'w' and ticket.seq <= tonumber(redis.call('HGET', KEYS[at], 'dead_seq') or 0) then
            ticket.byte = 's'
          end
        end
      end
    end
  end
  if #who > 0 then
    local bytes = redis.call('BITFIELD_RO', KEYS[4], unpack(gets))
    for i = 1, #who do
      local byte = bytes[i]
      if byte == 119 and who[i].seq <= I.dead_seq then
        who[i].byte = 's'
      elseif byte > 0 then
        who[i].byte = string.char(byte)
      end
    end
  end
end
local LIVE = {w = true, c = true, r = true, p = true}

local backlog_max = tonumber(ARGV[5])
local backlog = redis.call('XLEN', KEYS[6])
local waiting, line_max = redis.call('XLEN', KEYS[5]), tonumber(S.line_max)
local limit = tonumber(S.limit)
local line_open = open or now >= tonumber(S.line_opens_ms)
local first = I.next_seq
local seq, served, left = first, I.served, stock  -- as they will be after this batch
local serving = open and I.ready and not paused and not I.paused
local early = not open and now < tonumber(S.freeze_ms) and I.early == first - 1
local prefix = sku .. ':'
local fresh = {}  -- buyer -> index of the ticket given in this batch
local unit_of, byte_of, seq_of = {}, {}, {}
local pairs_, places, claims = {}, {}, {}
local out, o = {'JOINED', now, 0, 0}, 4

for i = 1, n do
  local buyer = ARGV[8 + i]
  local units = tonumber(ARGV[UNITS + i])
  local mine = fresh[buyer]
  local ticket = have[i]
  if mine then
    ticket = {sku = sku, seq = seq_of[mine], units = unit_of[mine], byte = byte_of[mine]}
  elseif ticket then
    if ticket.byte == 'w' and closed then
      ticket.byte = 'x'
    end
    if not LIVE[ticket.byte] and string.byte(again, i) == 49 then
      ticket = nil
    end
  end
  local claim = serving and served == seq - 1 and units <= left and (unlimited or tokens >= TOKEN)
  if ticket then
    local same = ticket.sku == sku and ticket.units == units or not LIVE[ticket.byte]
    out[o + 1], out[o + 2], out[o + 3] = same and 'H' or 'X', ticket.sku, ticket.seq
    out[o + 4], out[o + 5] = ticket.units, ticket.byte
    o = o + 5
  else
    local word
    if closed then
      word = 'K'
    elseif not line_open then
      word = 'Y'
    elseif units > limit then
      word = 'L'
    elseif open and not S.standby and (left == 0 or units > left and served == seq - 1) then
      word = 'S'
    elseif not claim and waiting >= line_max then
      word = 'F'
    elseif open and backlog >= backlog_max then
      word = 'B'
    end
    if word then
      o = o + 1
      out[o] = word
    else
      local digits = string.format('%d', seq)
      local at = #pairs_
      pairs_[at + 1], pairs_[at + 2] = buyer, prefix .. digits .. ':' .. ARGV[UNITS + i]
      if claim then
        left, tokens, backlog, served = left - units, tokens - TOKEN, backlog + 1, seq
        claims[#claims + 1] = '1|' .. S.epoch .. '|' .. sku .. '|' .. digits .. '|' .. ARGV[UNITS + i] .. '|' .. now ..
          '|' .. buyer
        word = 'C'
        byte_of[i] = 'c'
      else
        waiting = waiting + 1
        at = #places
        places[at + 1], places[at + 2] = digits .. '-0', ARGV[UNITS + i] .. ':' .. buyer
        word = 'W'
        byte_of[i] = 'w'
      end
      if early then
        local hash = string.sub(hashes, i * 10 - 9, i * 10)
        I.chain = redis.sha1hex(I.chain .. hash .. digits)
        early = early == true and {} or early
        early[#early + 1] = hash
      end
      fresh[buyer], seq_of[i], unit_of[i] = i, seq, units
      out[o + 1], out[o + 2] = word, seq
      o = o + 2
      seq = seq + 1
    end
  end
end
out[3], out[4] = served, seq
if seq == first then
  return out
end

redis.call('HSET', KEYS[7], unpack(pairs_))
redis.call('SETRANGE', KEYS[4], first - 1, string.rep('c', #claims) .. string.rep('w', #places / 2))
for i = 1, #claims do
  redis.call('XADD', KEYS[6], '*', 'c', claims[i])
end
for i = 1, #places, 2 do
  redis.call('XADD', KEYS[5], places[i], 'b', places[i + 1])
end
if type(early) == 'table' then
  redis.call('SETRANGE', KEYS[8], (first - 1) * 10, table.concat(early))
  redis.call('HSET', ITEM, 'next_seq', seq, 'served', served, 'early', seq - 1, 'chain', I.chain)
else
  redis.call('HSET', ITEM, 'next_seq', seq, 'served', served)
end
if #claims > 0 then
  redis.call('HSET', STOCK, sku, left)
end
if open then
  redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', unlimited and 0 or tokens, 'opened', '1')
else
  redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', tokens)
end
return out
