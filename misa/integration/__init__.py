"""Where the optimizer meets the libraries around it. Needs torch alone."""
