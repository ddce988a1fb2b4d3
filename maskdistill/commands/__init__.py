"""The commands of ``maskdistill``, one module each: arguments in, plain sentences out."""
