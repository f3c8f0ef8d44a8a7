"""Statistics of a set of images."""

from patch_based_ddpm.evaluation.metrics import Collector, join, share_of


def collect(pictures, *, batch_size=None, processes=1, extractor=None):
    """The statistics of a set, taken by one process after the other."""
    shares = []
    for process in range(processes):
        own = share_of(len(pictures), process, processes)
        collector = Collector(len(pictures), own.start, faces=True, extractor=extractor)
        for batch in pictures[own.start : own.stop].split(batch_size or len(pictures)):
            if len(batch):
                collector.add(batch)
        shares.append(collector.result())
    return join(shares)
