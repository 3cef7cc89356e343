"""What decides which captions a corpus keeps: rules, policies, and the clean shard they fill."""
