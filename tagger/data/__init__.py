"""From files to batches: sidecars, the memory-mapped index, sampling, decoding, augmentation and prefetching."""
