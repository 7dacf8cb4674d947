"""Networks of torch.export: `program` opens the file, `graph` and `steps` write its operations as steps."""
