"""What people see of their runs: the pages, and the figures they show. They read rollups, and write nothing."""
