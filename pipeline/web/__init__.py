"""What stands between the web and us: addresses, caps, deadlines, politeness."""
