"""Images and captions in, batches out: buckets, captions, crops, epoch order, caches. Knows no model."""
