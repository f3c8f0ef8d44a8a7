"""Statistics of a set of images."""

from patch_based_ddpm.evaluation import metrics


def collect(pictures, *, batch_size=None, processes=1, faces=True, extractor=None):
    """The statistics of a set, taken by one process after the other."""
    shares = []
    for process in range(processes):
        own = metrics.share_of(len(pictures), process, processes)
        batches = pictures[own.start : own.stop].split(batch_size or len(pictures)) if own else ()
        options = {"faces": faces, "extractor": extractor, "show": False}
        shares.append(metrics.collect(batches, own, len(pictures), label="", **options))
    return metrics.join(shares)
