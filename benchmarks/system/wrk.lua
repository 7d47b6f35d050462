-- For every run: one JSON line with the totals. With GUESTPASS_CHECK=STATUS:LENGTH, each response is looked at as well;
-- that costs the client more than the request itself, so it is done in a run of its own before the measured ones.
-- With GUESTPASS_TOKENS=FILE, the requests go round the bearer tokens in it, one a line. GUESTPASS_PREFIX stands before
-- the path, for a forward proxy.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

local requests, last = nil, 0

function init(args)
  wrong, seen = 0, 0
  wrk.path = (os.getenv("GUESTPASS_PREFIX") or "") .. wrk.path
  local path = os.getenv("GUESTPASS_TOKENS")
  if path then
    requests = {}
    for token in io.lines(path) do
      wrk.headers["Authorization"] = "Bearer " .. token
      table.insert(requests, wrk.format("GET"))
    end
  end
end

if os.getenv("GUESTPASS_TOKENS") then
  request = function()
    last = last % #requests + 1
    return requests[last]
  end
end

local check = os.getenv("GUESTPASS_CHECK")
if check then
  local status_wanted, length_wanted = check:match("(%d+):(%d+)")
  status_wanted, length_wanted = tonumber(status_wanted), tonumber(length_wanted)
  response = function(status, headers, body)
    seen = seen + 1
    if status ~= status_wanted or #body ~= length_wanted then
      wrong = wrong + 1
    end
  end
end

function done(summary, latency, _)
  local seen_by_all, wrong_by_all = 0, 0
  for _, thread in ipairs(threads) do
    seen_by_all = seen_by_all + thread:get("seen")
    wrong_by_all = wrong_by_all + thread:get("wrong")
  end
  io.write(string.format(
    '{"duration":%d,"requests":%d,"bytes":%d,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d,'
      .. '"p50":%d,"p90":%d,"p99":%d,"max":%d,"seen":%d,"wrong":%d}\n',
    summary.duration, summary.requests, summary.bytes, summary.errors.connect, summary.errors.read,
    summary.errors.write, summary.errors.status, summary.errors.timeout, latency:percentile(50),
    latency:percentile(90), latency:percentile(99), latency.max, seen_by_all, wrong_by_all))
end
