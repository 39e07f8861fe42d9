// For k6: an open loop. Requests start at a rate, whether or not the ones before them are answered.
//
//   k6 run -e API_KEY=sk-... -e BODIES=$PWD/bodies -e SCENARIO=text -e RATE=100 tests/tools/load/harness/k6.js
//
// SCENARIO: text, mixed, image or health. RATE: requests a second; without it VUS callers, each with one request under way.
// BASE_URL, DURATION (30s), VUS (64; with RATE the most that may be under way). It fails where a reply was not the right one, or
// where VUS were too few to hold the rate.
import http from 'k6/http';
import exec from 'k6/execution';
import { check } from 'k6';
import { SharedArray } from 'k6/data';
import { Counter } from 'k6/metrics';

const BASE_URL = __ENV.BASE_URL || 'http://localhost:6008';
const SCENARIO = __ENV.SCENARIO || 'text';
const RATE = Number(__ENV.RATE || 0);
const VUS = Number(__ENV.VUS || 64);
const DURATION = __ENV.DURATION || '30s';

const params = {
  headers: { Authorization: `Bearer ${__ENV.API_KEY || ''}`, 'Content-Type': 'application/json' },
  tags: { scenario: SCENARIO },
  timeout: '60s',
};
const refused = new Counter('refused_with_429');

// One copy for all virtual users. k6 takes a path that is not absolute from this file's folder.
const requests = new SharedArray('requests', () => {
  if (SCENARIO === 'health') {
    return [{ vectors: 0, body: null }];
  }
  const lines = open(`${__ENV.BODIES || 'bodies'}/${SCENARIO}.tsv`).trim().split('\n');
  return lines.map((line) => {
    const tab = line.indexOf('\t');
    return { vectors: Number(line.slice(0, tab)), body: line.slice(tab + 1) };
  });
});

const open_loop = { executor: 'constant-arrival-rate', rate: RATE, timeUnit: '1s', duration: DURATION, preAllocatedVUs: VUS };
const closed_loop = { executor: 'constant-vus', vus: VUS, duration: DURATION };

export const options = {
  scenarios: { [SCENARIO]: RATE ? open_loop : closed_loop },
  thresholds: { checks: ['rate==1'], dropped_iterations: ['count==0'] },
  summaryTrendStats: ['med', 'p(95)', 'p(99)', 'max'],
};

export default function () {
  const { vectors, body } = requests[exec.scenario.iterationInTest % requests.length];
  const reply = body === null ? http.get(`${BASE_URL}/health/live`, params) : http.post(`${BASE_URL}/v1/embeddings`, body, params);
  if (reply.status === 429) {
    refused.add(1);
  }
  check(reply, {
    'status is 200': (it) => it.status === 200,
    'every vector is there': (it) => body === null || (it.status === 200 && it.json().data.length === vectors),
  });
}
