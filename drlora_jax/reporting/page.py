def write_report(directories, out):
    pass
