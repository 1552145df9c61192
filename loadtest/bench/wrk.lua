-- wrk with a request of its own for each buyer. FAIRDROP_REQUESTS: a file of requests, separated by \0.
-- Prints one JSON line: answers, seconds, errors by kind, how many requests were used, latencies in ms.
local file = assert(io.open(os.getenv("FAIRDROP_REQUESTS"), "rb"))
local text = file:read("*a")
file:close()
local at = 1
used = 0  -- global: `done` reads it from the thread
local threads = {}

function setup(thread)
  threads[#threads + 1] = thread
end

function request()
  local stop = string.find(text, "\0", at, true)
  if not stop then
    at = 1
    stop = string.find(text, "\0", at, true)
  end
  local found = string.sub(text, at, stop - 1)
  at = stop + 1
  used = used + 1
  return found
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"answers":%d,"seconds":%.6f,"bytes":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d,"used":%d,'
      .. '"p50_ms":%.3f,"p99_ms":%.3f}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, e.connect, e.read, e.write, e.timeout, e.status,
    threads[1]:get("used"), latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
