"""What the service counts and times, in the text format of Prometheus."""

from collections.abc import Callable

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram


class ServiceMetrics:
  """What `/metrics` tells; a registry of its own, so that several apps fit into one process."""

  def __init__(self, waiting: Callable[[], int], in_flight: Callable[[], int]):
    self.registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=self.registry)
    self.requests = Counter(
        'patchcore_requests', 'Requests answered.', ['path', 'status'], registry=self.registry)
    self.seconds = Histogram(
        'patchcore_request_seconds', 'From the head of a request to the end of its answer.', ['path'],
        registry=self.registry, buckets=(.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10))
    self.batches = Histogram(
        'patchcore_batch_images', 'Images of a batch.', registry=self.registry,
        buckets=(1, 2, 4, 8, 16, 32, 64))
    self.scoring = Histogram(
        'patchcore_scoring_seconds', 'Network and search, a batch.', registry=self.registry,
        buckets=(.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10))
    self.failures = Counter('patchcore_failed_batches', 'Batches that raised.', registry=self.registry)
    self.decisions = Counter('patchcore_images', 'Images scored.', ['decision'], registry=self.registry)
    self.ready = Gauge('patchcore_ready', '1 once compiled.', registry=self.registry)
    for name, text, value in (
        ('patchcore_waiting_images', 'Images that wait for a batch.', waiting),
        ('patchcore_requests_in_flight', 'Requests worked on.', in_flight)):
      Gauge(name, text, registry=self.registry).set_function(value)
