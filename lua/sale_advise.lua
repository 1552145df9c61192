#!lua
-- sale_advise: slow a sale's admission down, say why, and say what buyers are told; all of it ends by the clock.
--
-- KEYS[1] sale        hash    the sale
-- ARGV[1] epoch       integer >= 1
-- ARGV[2] home        run_id the caller's connection saw
-- ARGV[3] now_ms      integer, 0 = server TIME
-- ARGV[4] slow_milli  thousandths of tickets a second at most, -1: as fast as the operator wants
-- ARGV[5] base_milli  what it was slowed down from, for who takes over and for operators; -1: not slowed
-- ARGV[6] reason      a word for the board; '' if not slowed
-- ARGV[7] notices     words for tickets, joined by ','; '' if there are none
-- ARGV[8] lease_ms    how long this holds unless it is said again
--
-- Returns {'GONE'} | {'OLD'} | {'ADVISED', until_ms}
-- Law: the operator's rate and burst stay as they are. The bucket is settled at the rate in force before; what a faster
--   rate has saved up beyond a second of the slower one is gone with the next ticket.
-- Cost: O(1).
--@ part sale
--@ part admission
--@ part tokens
local ends = now + tonumber(ARGV[8])
redis.call('HSET', KEYS[1], 'last_ms', now, 'tokens_micro', tokens, 'slow_milli', ARGV[4], 'slow_base_milli', ARGV[5],
  'slow_reason', ARGV[6], 'notices', ARGV[7], 'advice_until_ms', ends)
return {'ADVISED', ends}
