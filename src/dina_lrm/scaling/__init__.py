"""More than one process: datasets scored by many workers (`bulk`), servers with replicas (`replicas`)."""
