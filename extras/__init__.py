"""What a reader of the papers can skip: words, file formats, checkpoints, processes, the toy shop, reports, speed."""
