"""How customers say things in Chinese; the twin of `phrases_en`."""

from __future__ import annotations

REQUESTS: dict[str, tuple[str, ...]] = {
    "cancel_order": ("取消订单{order_id}", "我不要{order_id}了，请取消", "请把订单{order_id}撤销"),
    "track_order": ("订单{order_id}到哪里了", "查一下{order_id}的物流", "{order_id}什么时候到"),
    "refund_order": (
        "订单{order_id}{reason}，请退款{amount}",
        "{order_id}{reason}，我要退{amount}元",
        "退我{amount}，{order_id}{reason}",
    ),
    "change_address": (
        "把{order_id}寄到邮编{zip}",
        "订单{order_id}的邮编改成{zip}",
        "我搬家了，{order_id}送到{zip}",
    ),
    "reschedule_delivery": (
        "{order_id}改到{date}送",
        "请在{date}配送订单{order_id}",
        "我{date}在家，那天送{order_id}",
    ),
    "upgrade_shipping": (
        "订单{order_id}改用{speed}",
        "{order_id}请用{speed}发货",
        "我想给{order_id}换成{speed}",
    ),
    "change_quantity": (
        "订单{order_id}改成{quantity}件",
        "{order_id}我要{quantity}个",
        "把{order_id}的数量改为{quantity}",
    ),
    "apply_coupon": (
        "订单{order_id}使用优惠码{code}",
        "把{code}用在{order_id}上",
        "{order_id}忘了输优惠券{code}",
    ),
    "return_item": (
        "我要退掉{order_id}里的{product}",
        "订单{order_id}的{product}退货",
        "{product}想退，订单{order_id}",
    ),
    "send_invoice": (
        "把{order_id}的发票发到{email}",
        "订单{order_id}开发票，邮箱{email}",
        "{email}需要{order_id}的发票",
    ),
    "check_stock": ("{city}有{product}吗", "{city}店的{product}有货吗", "查一下{city}还有没有{product}"),
    "get_price": ("{product}多少钱", "{product}的价格是多少", "请问{product}怎么卖"),
    "store_hours": ("{city}店几点开门", "{city}的营业时间", "{city}周末开门吗"),
    "update_email": ("我的邮箱改成{email}", "请更新邮箱为{email}", "以后用{email}联系我"),
    "reset_password": ("{email}忘记密码了", "重置{email}的密码", "我登录不了{email}"),
    "subscribe_newsletter": (
        "用{email}订阅{frequency}资讯",
        "把{frequency}新闻发到{email}",
        "{email}想要{frequency}简报",
    ),
    "close_account": (
        "注销账户{email}，{delete_data}",
        "关闭{email}，{delete_data}",
        "我要走了，注销{email}，{delete_data}",
    ),
    "set_notifications": ("{enabled}{channel}通知", "请{enabled}{channel}提醒", "帮我{enabled}{channel}消息"),
    "create_ticket": (
        "{topic}有问题，{priority}",
        "开一个{priority}工单，关于{topic}",
        "我要投诉{topic}，{priority}",
    ),
    "book_callback": ("{date}{hour}给我回电话", "预约{date}{hour}的电话", "请在{date}{hour}打给我"),
    "gift_card_balance": ("礼品卡{card}还有多少余额", "查一下礼品卡{card}", "卡{card}里还有钱吗"),
    "warranty_claim": (
        "{product}坏了，序列号{serial}，申请保修",
        "保修{product}，序列号{serial}",
        "序列号{serial}的{product}要保修",
    ),
    "escalate_to_human": ("转人工", "我要和真人说话", "请找客服人员"),
}
WORDS: dict[str, dict[object, tuple[str, ...]]] = {
    "reason": {
        "damaged": ("坏了", "有破损"),
        "late": ("来晚了", "迟到了"),
        "wrong_item": ("发错了", "不是我买的"),
        "unwanted": ("不需要了", "买错了"),
    },
    "speed": {"standard": ("普通快递",), "express": ("加急快递",), "overnight": ("次日达",)},
    "frequency": {"daily": ("每天的",), "weekly": ("每周的",), "monthly": ("每月的",)},
    "channel": {"sms": ("短信",), "email": ("邮件",), "push": ("推送",)},
    "priority": {"low": ("不着急",), "normal": ("一般",), "high": ("很紧急",)},
    "topic": {"billing": ("账单",), "delivery": ("配送",), "website": ("网站",), "quality": ("质量",)},
    "enabled": {True: ("打开",), False: ("关闭",)},
    "delete_data": {True: ("删除数据", "全部删掉"), False: ("保留数据", "别删记录")},
    "quantity": {n: (str(n), word) for n, word in enumerate("两三四五六七八九", start=2)},
    "hour": {h: (f"{h}点",) if h < 13 else (f"{h}点", f"下午{h - 12}点") for h in range(9, 19)},
    "product": {
        "headphones": ("耳机",),
        "laptop": ("电脑",),
        "backpack": ("背包",),
        "kettle": ("水壶",),
        "lamp": ("台灯",),
        "keyboard": ("键盘",),
        "jacket": ("外套",),
        "camera": ("相机",),
        "router": ("路由器",),
        "tent": ("帐篷",),
    },
    "city": {
        "Oslo": ("奥斯陆",),
        "Lyon": ("里昂",),
        "Porto": ("波尔图",),
        "Gdansk": ("格但斯克",),
        "Leeds": ("利兹",),
        "Turin": ("都灵",),
        "Malmo": ("马尔默",),
        "Ghent": ("根特",),
    },
}
DATES = ("{month}月{day}日", "{month}月{day}号")
CHAT = (
    "谢谢，已经好了",
    "你好",
    "没事了，我自己找到了",
    "服务很好",
    "早上好",
    "我只是看看",
    "今天不需要什么",
    "周末愉快",
)
BEFORE = (
    "我是{name}，",
    "你好，我叫{name}。",
    "{name}想问：",
    "这里是{name}，",
    "我朋友{name}让我来问，",
    "替{name}问一下，",
)
AFTER = ("。谢谢，{name}", "。{name}敬上", "。我是{name}", "，拜托了，{name}", "。联系人{name}")
OPENERS = ("", "", "请问，", "麻烦你，", "帮个忙，")
JOINS = ("，然后", "，还有", "。另外，", "，再", "，并且")
