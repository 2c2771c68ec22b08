-- wrk's script: POSTs the file $BODY with the headers of the file $HEADERS, prints one line of figures.
local function read(name)
  local f = assert(io.open(name, "rb"))
  local text = f:read("*a")
  f:close()
  return text
end

wrk.method, wrk.body = "POST", read(os.getenv("BODY"))
for name, value in read(os.getenv("HEADERS")):gmatch("([^:\n]+):%s*([^\n]*)") do
  wrk.headers[name] = value
end

done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %d %.6f %.1f %.1f %d\n", summary.requests, summary.duration / 1e6,
    latency:percentile(50), latency:percentile(99), e.status + e.connect + e.read + e.write + e.timeout))
end
