-- For wrk: as many requests under way as there are connections, every reply checked.
--
--   export API_KEY=sk-... BODIES=bodies
--   wrk -t 2 -c 64 -d 60s --timeout 60s --latency -s tests/tools/load/harness/wrk.lua http://localhost:6008 -- text
--
-- After the dashes: text, mixed, image or health. Below wrk's own summary it counts the replies, and ends with 1 where one was not
-- the right one. wrk's default timeout of 2 s only counts late replies as errors, hence the option.

local threads = {}

function setup(thread)
   thread:set("number", #threads)
   table.insert(threads, thread)
end

function init(args)
   good, busy, refused, wrong = 0, 0, 0, 0
   local scenario = args[1] or "text"
   requests = {}
   if scenario == "health" then
      requests[1] = wrk.format("GET", "/health/live")
      return
   end
   local headers = { ["Authorization"] = "Bearer " .. (os.getenv("API_KEY") or ""), ["Content-Type"] = "application/json" }
   for line in io.lines((os.getenv("BODIES") or "bodies") .. "/" .. scenario .. ".tsv") do
      local count, body = line:match("^(%d+)\t(.*)$")
      -- A reply does not say to which request: all of a file have the same number.
      vectors = vectors or tonumber(count)
      assert(vectors == tonumber(count), "the requests have different numbers of vectors")
      requests[#requests + 1] = wrk.format("POST", "/v1/embeddings", headers, body)
   end
   -- Threads start apart: identical inputs that are under way at once are computed once.
   place = math.floor(number * #requests / 16)
end

function request()
   place = (place or 0) % #requests + 1
   return requests[place]
end

function response(status, headers, body)
   if status == 429 then
      busy = busy + 1
   elseif status ~= 200 then
      refused = refused + 1
   elseif vectors and select(2, body:gsub('"index":', "")) ~= vectors then
      wrong = wrong + 1
   else
      good = good + 1
   end
end

function done(summary, latency)
   local count = { good = 0, busy = 0, refused = 0, wrong = 0 }
   for _, thread in ipairs(threads) do
      for name in pairs(count) do
         count[name] = count[name] + thread:get(name)
      end
   end
   local errors = summary.errors
   local broken = errors.connect + errors.read + errors.write + errors.timeout
   print(string.format("Replies: %d good, %d refused with 429, %d with another status, %d with a wrong number of vectors; %d broken",
      count.good, count.busy, count.refused, count.wrong, broken))
   print(string.format("Good replies: %.1f/s. All replies: p50 %.1f ms, p99 %.1f ms",
      count.good * 1e6 / summary.duration, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
   if count.good == 0 or count.busy + count.refused + count.wrong + broken > 0 then
      os.exit(1)
   end
end
