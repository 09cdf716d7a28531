"""Image files to batches: `folder` and `layouts` list them, `mvtec_ad` keeps them in records, `preprocess`
decodes, `pipeline` batches, `synthetic` draws."""
