"""The way from image files to batches: `folder` and `layouts` list the files, `mvtec_ad` keeps them in
records, `preprocess` decodes them, `pipeline` batches them."""
