-- Chat completions of many conversations, and a summary as one line of JSON.
-- Arguments after `--`: model, key, "stream" or "whole", further fields as a JSON object.
local requests, at = {}, 0

function init(args)
  local model, key, stream = args[1], args[2], args[3] == "stream"
  local more = (args[4] or "{}"):sub(2, -2)
  more = more == "" and "" or "," .. more
  local headers = {["Content-Type"] = "application/json", ["Authorization"] = "Bearer " .. key}
  for i = 1, 512 do
    local body = string.format(
      '{"model":"%s","messages":[{"role":"user","content":"Question %d: what time is it?"}],' ..
      '"max_tokens":32,"temperature":0%s%s}', model, i, more, stream and ',"stream":true' or "")
    requests[i] = wrk.format("POST", "/v1/chat/completions", headers, body)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'SUMMARY {"requests": %d, "seconds": %.6f, "bytes": %d, "errors": %d, "p50_ms": %.4f, "p99_ms": %.4f}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
