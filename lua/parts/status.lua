-- part status: what was last told about one ticket, and by which version of its row.
--
-- Needs STATUS (key), `sku`, `seq`. Gives status_field, ask_field, told_version (0 = nothing yet), told_json.
local status_field = sku .. ':' .. seq
local ask_field = status_field .. ':a'
local told_version, told_json = 0, '{}'
do
  local told = redis.call('HGET', STATUS, status_field)
  if told then
    local version, json = string.match(told, '^(%d+)|.|(.*)$')
    told_version, told_json = tonumber(version), json
  end
end
