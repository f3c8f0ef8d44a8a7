"""Statistics of a set of images."""

from patch_based_ddpm.evaluation.statistics import Collector, join, stretch_of


def collect(pictures, *, batch_size=None, processes=1, extractor=None):
    """The statistics of a set, taken by one process after the other."""
    stretches = []
    for process in range(processes):
        own = stretch_of(len(pictures), process, processes)
        collector = Collector(len(pictures), own.start, faces=True, extractor=extractor)
        for batch in pictures[own.start : own.stop].split(batch_size or len(pictures)):
            if len(batch):
                collector.add(batch)
        stretches.append(collector.result())
    return join(stretches)
