"""Image files to batches: `folder` lists, `preprocess` decodes, `pipeline` batches, `synthetic` draws."""
