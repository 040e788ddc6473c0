"""Several processes that train one model: gradients, draws and checks between them. Needs torch alone."""
