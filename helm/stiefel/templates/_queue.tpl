{{/* How many workers a pool should have: one for each job that waits and fits, and one for each that it trains already.
     KEDA takes from that the Jobs that have not ended, so that none is started twice, whether or not a worker that was
     just started has claimed its job yet.

     Of an owner at a limit (running jobs, device hours) no more count than may start: workers for the others would find
     nothing, end, and be started again. The rules are those of jobs/schedule.py and jobs/keys.py. */}}
{{- define "stiefel.wantedWorkers" -}}
{{- $cpu := eq (int .gpus) 0 -}}
WITH waiting AS (
  SELECT owner, count(*) AS jobs
  FROM jobs
  WHERE state = 'queued'
    AND not_before <= extract(epoch FROM clock_timestamp())
    AND device IN ('any', '{{ ternary "cpu" "gpu" $cpu }}')
    AND devices <= {{ ternary .cpuSlots .gpus $cpu | int }}
  GROUP BY owner
), allowed AS (
  SELECT CASE
    WHEN api_keys.device_seconds >= api_keys.max_device_hours * 3600 THEN 0
    WHEN api_keys.max_running IS NULL THEN waiting.jobs
    ELSE least(waiting.jobs, greatest(0, api_keys.max_running - (
      SELECT count(*) FROM jobs WHERE jobs.owner = waiting.owner AND jobs.state = 'running')))
    END AS jobs
  FROM waiting LEFT JOIN api_keys ON api_keys.id = waiting.owner
)
SELECT (coalesce((SELECT sum(jobs) FROM allowed), 0)
  + (SELECT count(*) FROM jobs WHERE state = 'running' AND worker LIKE '{{ .name }}:%'))::integer
{{- end }}
