def write_page(path, record, panels):
    pass
